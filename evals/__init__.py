"""How good a model is, by the published rules of others: HellaSwag, LAMBADA, WikiText, bits per byte."""
