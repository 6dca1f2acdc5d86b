"""qwenfit: plan, run, tune and measure Qwen models on your own hardware."""
