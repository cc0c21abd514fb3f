package entry

const (
	sysPrctl     = 157
	sysPrlimit64 = 302
)
