"""What a trained model has lost or gained elsewhere: public benchmarks by language, and preferences held out."""
