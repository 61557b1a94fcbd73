"""GGUF: files of llama.cpp, with their config and tokenizer inside."""
