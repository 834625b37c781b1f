"""How fast, large and accurate a quantized model is where it runs: beside float, and beside what peers make of it."""
