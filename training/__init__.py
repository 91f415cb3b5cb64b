"""Trains, evaluates and documents models: installed as `vanilla_transformer.training`."""
