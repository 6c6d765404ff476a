"""Trains SASRec with RecTools, with RecBole and with this project on the same sequences, one after another."""
