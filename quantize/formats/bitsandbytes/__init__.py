"""The stock bitsandbytes checkpoint: nothing outside this folder imports bitsandbytes or knows its tensors."""
