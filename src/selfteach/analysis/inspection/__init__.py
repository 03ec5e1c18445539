"""An inspection's tables, read and summed up: where advantages stand relative to the first error."""
