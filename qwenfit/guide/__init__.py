"""The hardware guide made checkable: every figure of it beside the plan's, with a word and the bound that it breaks."""
