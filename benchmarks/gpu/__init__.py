"""What a GPU must give: the same numbers as OpenAI's code, and how fast. See docs/benchmarks/gpu.md."""
