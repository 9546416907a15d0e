"""Studies: evaluation, tables, plots, model cards, and the runs that tie them together."""
