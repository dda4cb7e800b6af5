"""The methods that spread one inference, one folder each: model, data, fleet -> plan."""
