#!/usr/bin/env python3
"""Fine-tune Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 on your own images.

    python scripts/training/train_qwen_vlm.py \\
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_path data/flickr8k --output_dir runs/flickr8k
    python scripts/training/train_qwen_vlm.py recipe.yaml --learning_rate 1e-4

The data may lie in any format that vlmtune reads. All options: --help. train_gemma3_vlm.py shows the steps one by one.
"""

from family_script import main

if __name__ == "__main__":
    main("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5")
