"""One module for each claim: `judge` computes its verdict, `panels` its picture."""
