"""The page about speed, made of the documents in a folder: ``python -m normzoo_bench.report``."""
