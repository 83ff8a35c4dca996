"""Print how many documents the standard library makes, and of how many characters; anything else is noise."""

from utils.data.domains.python_docs import python_documents, standard_modules

texts = [document["text"] for document in python_documents(standard_modules())]
print(len(texts), sum(map(len, texts)))
