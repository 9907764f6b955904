"""Pages about made-up people, a knowledge source for FActScore."""

PAGES = {
    "Ada Lind": "Ada Lind was born in Oslo. She painted ships. She died in 1950.",
    "Ben Ruiz": "Ben Ruiz is a chef from Lima. He wrote two books.",
    "Cy Okoro": "Cy Okoro is a runner.",
    "Di Wang": "Di Wang built bridges.",
}
