"""CROW: remove backdoors from large language models."""
