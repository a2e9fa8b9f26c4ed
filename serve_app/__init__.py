"""Two-stage search as a Ray Serve fleet: BM25 recall chained to vLLM rerankers."""

__version__ = "0.1.0"
