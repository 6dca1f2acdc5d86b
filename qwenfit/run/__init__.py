"""The verbs that execute a plan: chat, generate, the model cache, doctor."""
