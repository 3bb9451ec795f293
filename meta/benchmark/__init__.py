"""The accuracy benchmark: data sets, shifts, streams, and the runs that compare methods on them."""
