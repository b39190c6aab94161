"""What other houses' programs make of ours, with the programs themselves: they are fetched for the run, into a folder
that is gone after it. `make real` runs it; it needs a package index."""
