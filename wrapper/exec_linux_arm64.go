package wrapper

const sysExecveat = 281
