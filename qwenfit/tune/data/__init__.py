"""Training data: files to rows, rows to conversations or text, those to labelled tokens, and tokens to packed rows."""
