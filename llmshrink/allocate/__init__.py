"""What each part of a model gets, so that the whole costs least within a budget of bytes."""
