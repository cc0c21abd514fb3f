package entry

const (
	sysPrctl     = 167
	sysPrlimit64 = 261
)
