"""Answering people and programs: a chat endpoint, a chat in the terminal, and publishing a model."""
