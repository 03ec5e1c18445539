"""Where problems come from: rows of files and datasets, columns, splits, generators, the audit."""
