"""A trained model for other programs: a transformers folder, a GGUF file, an Ollama folder, a hub repository."""
