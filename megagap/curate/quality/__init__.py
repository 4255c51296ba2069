"""The quality classifier: five criteria and an overall judgement, each low, medium or high."""
