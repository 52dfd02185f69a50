"""Contrastive training of a CLIP on images with captions: `hf_clip/commands/finetune.py`, from a checkout.

accelerate launch finetune.py --model clip-vit-b32/ --dataset my/pairs --num_train_epochs 3 --output_dir fine-tuned/
accelerate launch finetune.py run.yaml --max_steps 100
"""

import os
import sys

# Threads that wait for work in a loop take the cores from whatever else runs. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hf_clip.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
