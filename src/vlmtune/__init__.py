"""vlmtune fine-tunes vision-language models on your own images."""
