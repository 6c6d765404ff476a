"""The HTTP gateway: JSON over HTTP for callers that speak no gRPC, in front of one or more recommender servers."""
