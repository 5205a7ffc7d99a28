"""Data in any format to messages JSONL, Parquet or WebDataset shards."""
