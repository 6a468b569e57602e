"""Times and peak memory of whole models, ours and others, in one run."""
