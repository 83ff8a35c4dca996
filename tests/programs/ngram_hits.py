"""Print the repeated n-grams that are found in one document: the order must not be that of a set."""

from utils.data.ngram_overlap import NgramIndex

document = " ".join(f"w{i % 7}" for i in range(300)).split()
hits = NgramIndex([document[3:20], document[5:14]], [13, 9]).find(document)
print(sorted((hit.text, hit.start, hit.at) for hit in hits))
