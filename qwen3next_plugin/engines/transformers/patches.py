"""How the plugin changes transformers: by `override` of its models, listed in docs/patches.md."""

VERSIONS = ">=5.16,<5.25"  # that need it
