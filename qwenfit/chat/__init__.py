"""Messages to prompts: ChatML for Qwen-1, the models' own templates for later ones."""
