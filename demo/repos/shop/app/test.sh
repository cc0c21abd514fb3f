echo "12 tests passed"
