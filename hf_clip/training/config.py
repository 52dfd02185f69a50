"""Everything that one training run can be told, checked before any work is done."""

from dataclasses import dataclass, field


@dataclass
class TrainingConfig:
    """The flags of finetune.py. Defaults of the optimizer are the paper's for ViTs (table 18)."""

    model: str = field(metadata={"help": "Folder or Hub repository of the model to start from"})
    dataset: str = field(
        metadata={
            "help": "Repository on the Hub, folder of pictures with metadata.csv or .jsonl (file_name, caption), "
            "or folder written by Dataset.save_to_disk"
        }
    )
    output_dir: str = field(metadata={"help": "Folder for the trained model and metrics.jsonl"})
    split: str = field(default="train", metadata={"help": "Split of the data set to train on"})
    image_column: str = field(default="image", metadata={"help": "Column with pictures"})
    caption_column: str = field(default="caption", metadata={"help": "Column with texts"})
    batch_size: int = field(default=256, metadata={"help": "Pairs per step; every other pair is a negative"})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps"})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate"})
    warmup_steps: int = field(default=50, metadata={"help": "Steps of linear warm-up before the cosine"})
    weight_decay: float = field(default=0.2, metadata={"help": "Decoupled weight decay of matrices"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta 1"})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta 2 (the paper's ResNets: 0.999)"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon (the paper's ResNets: 1e-8)"})
    num_workers: int = field(default=1, metadata={"help": "Processes that open and preprocess pictures"})
    logging_steps: int = field(default=25, metadata={"help": "Steps between two lines of metrics.jsonl"})
    seed: int = field(default=0, metadata={"help": "Seed of the order of the data"})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that stands in output_dir"})

    def __post_init__(self) -> None:
        if self.image_column == self.caption_column:
            raise ValueError(f"image_column and caption_column are both {self.image_column!r}; name one for each.")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}, but a pair is learned against others: take at least 2.")
        for name in ("max_steps", "learning_rate", "logging_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be positive.")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but must be between 0 and max_steps, {self.max_steps}."
            )
