"""Many requests at once through one network: `engine.Engine.step` is schedule, run, sample; `llm.LLM` is the door."""
