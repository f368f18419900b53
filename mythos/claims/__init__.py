"""Claims about looped transformers as experiments: definitions, runs, measurements, verdicts.

A claim is a file in configs/claims/ and a module in `mythos.claims.judges` with the function that judges it.
"""
