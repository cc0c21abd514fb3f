// Package nearest finds the word that a mistyped one was meant to be.
package nearest

// Word returns the known word that text most likely meant, or "".
func Word(text string, known []string) string {
	if len(text) < 3 {
		return "" // nearly everything is as near
	}
	best, bestDistance := "", 1+len(text)/3
	for _, k := range known {
		if d := Distance(text, k); d <= bestDistance {
			if d < bestDistance || best == "" {
				best, bestDistance = k, d
			}
		}
	}
	return best
}

// Distance is the number of letters to add, drop or change between a and b
// (Levenshtein). It takes as many steps as the product of their lengths.
func Distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := diagonal
			if a[i] != b[j] {
				next = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
