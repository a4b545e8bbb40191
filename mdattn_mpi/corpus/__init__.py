"""From texts to token ids: what `mdattn convert --tokenizer` does.

texts       one text after the other, of .jsonl, .txt, FASTA and Parquet, and where each stands
tokenizer   a folder's tokenizer, on all cores
packing     short texts one after the other in one sequence
convert     all of it, into a file of token ids
"""
