"""SGLang: the only code that imports sglang."""
