"""Which code each weight takes, and which scale each block: GPTQ with a scale search, and learned rounding."""
