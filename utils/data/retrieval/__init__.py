"""Passages of the documents in the prompt: BM25 over the corpus, or what a person's own retriever found."""
