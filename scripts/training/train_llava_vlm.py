#!/usr/bin/env python3
"""Fine-tune LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision on your own images.

    python scripts/training/train_llava_vlm.py \\
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_path data/flickr8k --output_dir runs/flickr8k
    python scripts/training/train_llava_vlm.py recipe.yaml --learning_rate 1e-4

The data may lie in any format that vlmtune reads. All options: --help. train_gemma3_vlm.py shows the steps one by one.
"""

from family_script import main

if __name__ == "__main__":
    main("llava", "llava_next", "llava_onevision")
