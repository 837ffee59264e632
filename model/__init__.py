"""The network (`gpt`) and its file formats (`llmc`, `hf`)."""
