"""The commands of the `longlive-rag` command line, one module each; see `longlive_rag.cli`."""
