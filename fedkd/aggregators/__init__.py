"""From answers to knowledge: weighted means, and what sharpens them."""

from fedkd.aggregators.mean import enhanced_era, era, mean_of, mean_weights, weighted_mean

__all__ = ["enhanced_era", "era", "mean_of", "mean_weights", "weighted_mean"]
