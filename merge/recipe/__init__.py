"""mergekit recipes: YAML in, what each output tensor is made from out. Pure: no store, no weights."""
