"""peftkit: one YAML recipe becomes a trained, certified adapter."""

__version__ = "0.1.0"
