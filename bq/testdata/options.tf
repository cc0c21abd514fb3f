# Written by tallyman bq terraform. The same as tallyman bq apply makes.

terraform {
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0"
    }
  }
}

resource "google_bigquery_dataset" "tallyman" {
  project     = "acme-ci"
  dataset_id  = "fleet"
  location    = "EU"
  description = "Who called docker on the runners: records and answers of Tallyman."
}

resource "google_bigquery_table" "records" {
  project                  = "acme-ci"
  dataset_id               = google_bigquery_dataset.tallyman.dataset_id
  table_id                 = "records"
  description              = "Every record of Tallyman, one row for each delivery of it; records_unique has each once."
  require_partition_filter = true
  clustering               = ["kind", "repository", "workflow"]
  time_partitioning {
    type  = "DAY"
    field = "ts"
  }
  schema = <<EOT
[
  {
    "name": "id",
    "type": "STRING",
    "mode": "REQUIRED",
    "description": "ID is a UUIDv7 (RFC 9562): unique, ordered by time, made once where the record is born. Every later stage removes duplicates by it."
  },
  {
    "name": "ts",
    "type": "TIMESTAMP",
    "mode": "REQUIRED",
    "description": "TS is the time of what is recorded, not of its delivery: RFC 3339 in UTC with nanoseconds. In tables with microseconds."
  },
  {
    "name": "kind",
    "type": "STRING",
    "mode": "REQUIRED",
    "description": "Kind says what the record is about: invocation, invocation.end, event, loss, job.start, job.end or http."
  },
  {
    "name": "schema",
    "type": "INTEGER",
    "mode": "NULLABLE",
    "description": "Schema is the version of this schema that the writer knew."
  },
  {
    "name": "by",
    "type": "STRING",
    "mode": "NULLABLE",
    "description": "By says how the job context in ci was found: sealed, environment, inferred or none."
  },
  {
    "name": "repository",
    "type": "STRING",
    "mode": "NULLABLE",
    "description": "Repository is owner/name, from GITHUB_REPOSITORY (OpenTelemetry: vcs.repository.name with vcs.owner.name). The same as ci.repository: a table is clustered by columns at its top only."
  },
  {
    "name": "workflow",
    "type": "STRING",
    "mode": "NULLABLE",
    "description": "Workflow is the workflow's name, or its path where it has none; that of the caller for reusable workflows, from GITHUB_WORKFLOW (OpenTelemetry: cicd.pipeline.name). The same as ci.workflow: a table is clustered by columns at its top only."
  },
  {
    "name": "outside_job",
    "type": "BOOLEAN",
    "mode": "NULLABLE",
    "description": "OutsideJob is true when the record was made while no job was known on the runner and nothing in it hinted at one (the runner's own wait for its Docker daemon, for example). Such records are not counted as unattributed."
  },
  {
    "name": "ci",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "CI is the GitHub Actions job that caused the record.",
    "fields": [
      {
        "name": "repository",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Repository is owner/name, from GITHUB_REPOSITORY (OpenTelemetry: vcs.repository.name with vcs.owner.name)."
      },
      {
        "name": "repository_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "RepositoryID is the number of the repository, stable when it is renamed, from GITHUB_REPOSITORY_ID."
      },
      {
        "name": "owner",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Owner is the user or organisation, from GITHUB_REPOSITORY_OWNER (OpenTelemetry: vcs.owner.name)."
      },
      {
        "name": "owner_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "OwnerID is the number of the owner, from GITHUB_REPOSITORY_OWNER_ID."
      },
      {
        "name": "workflow",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Workflow is the workflow's name, or its path where it has none; that of the caller for reusable workflows, from GITHUB_WORKFLOW (OpenTelemetry: cicd.pipeline.name)."
      },
      {
        "name": "workflow_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "WorkflowRef is the path and ref of the workflow file, from GITHUB_WORKFLOW_REF."
      },
      {
        "name": "workflow_sha",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "WorkflowSHA is the commit of the workflow file, from GITHUB_WORKFLOW_SHA."
      },
      {
        "name": "job",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Job is the job's key in the workflow file, the same for all legs of a matrix, from GITHUB_JOB (OpenTelemetry: cicd.pipeline.task.name)."
      },
      {
        "name": "job_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobID is the numeric id of the job (its check run), from the runner's Worker log or JOB_CHECK_RUN_ID (OpenTelemetry: cicd.pipeline.task.run.id)."
      },
      {
        "name": "job_name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobName is the display name of the job with its matrix values, from the runner's Worker log."
      },
      {
        "name": "job_url",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobURL opens the log of the job; made from server_url, repository, run_id and job_id where all are known (OpenTelemetry: cicd.pipeline.task.run.url.full)."
      },
      {
        "name": "job_workflow_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobWorkflowRef is the path and ref of the reusable workflow that defines the job, where known."
      },
      {
        "name": "orchestration_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "OrchestrationID tells the legs of a matrix apart, from ACTIONS_ORCHESTRATION_ID (runner 2.331.0 and later, where the server sends it)."
      },
      {
        "name": "run_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "RunID is the id of the workflow run, from GITHUB_RUN_ID (OpenTelemetry: cicd.pipeline.run.id)."
      },
      {
        "name": "run_number",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "RunNumber is the number of the run in its workflow, from GITHUB_RUN_NUMBER."
      },
      {
        "name": "run_attempt",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "RunAttempt is 1 for the first attempt of the run, from GITHUB_RUN_ATTEMPT."
      },
      {
        "name": "event_name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "EventName is what triggered the workflow (push, schedule, ...), from GITHUB_EVENT_NAME."
      },
      {
        "name": "ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Ref is the full git ref of the run, from GITHUB_REF (OpenTelemetry: vcs.ref.head.name)."
      },
      {
        "name": "head_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "HeadRef is the source branch of a pull request, from GITHUB_HEAD_REF."
      },
      {
        "name": "sha",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "SHA is the commit of the run, from GITHUB_SHA (OpenTelemetry: vcs.ref.head.revision)."
      },
      {
        "name": "actor",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Actor is the login of who triggered the run first, from GITHUB_ACTOR."
      },
      {
        "name": "triggering_actor",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "TriggeringActor is the login of who triggered this attempt, from GITHUB_TRIGGERING_ACTOR."
      },
      {
        "name": "step",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Step is the id of the calling step, or the name the runner made for it (__run_2), from the caller's GITHUB_ACTION; never guessed by time, because steps can overlap."
      },
      {
        "name": "action_repository",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ActionRepository is owner/name of the action that the calling step uses, from GITHUB_ACTION_REPOSITORY or the path in GITHUB_ACTION_PATH."
      },
      {
        "name": "action_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ActionRef is the ref of that action, from GITHUB_ACTION_REF."
      },
      {
        "name": "tracking_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "TrackingID is the runner's own id of the job (RUNNER_TRACKING_ID), by which records and sealed context find each other."
      },
      {
        "name": "runner",
        "type": "RECORD",
        "mode": "NULLABLE",
        "description": "Runner is the runner that ran the job.",
        "fields": [
          {
            "name": "name",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Name is the runner's name, from RUNNER_NAME; on Actions Runner Controller also the name of the pod."
          },
          {
            "name": "os",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "OS is Linux, Windows or macOS, from RUNNER_OS."
          },
          {
            "name": "arch",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Arch is X86, X64, ARM or ARM64, from RUNNER_ARCH."
          },
          {
            "name": "environment",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Environment is github-hosted or self-hosted, from RUNNER_ENVIRONMENT."
          },
          {
            "name": "labels",
            "type": "STRING",
            "mode": "REPEATED",
            "description": "Labels are the runner's labels or the name of its scale set, where the installation names them."
          }
        ]
      }
    ]
  },
  {
    "name": "claim",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "Claim is what the caller's environment said of its job, kept only where it disagrees with the sealed context in ci.",
    "fields": [
      {
        "name": "repository",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Repository is owner/name, from GITHUB_REPOSITORY (OpenTelemetry: vcs.repository.name with vcs.owner.name)."
      },
      {
        "name": "repository_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "RepositoryID is the number of the repository, stable when it is renamed, from GITHUB_REPOSITORY_ID."
      },
      {
        "name": "owner",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Owner is the user or organisation, from GITHUB_REPOSITORY_OWNER (OpenTelemetry: vcs.owner.name)."
      },
      {
        "name": "owner_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "OwnerID is the number of the owner, from GITHUB_REPOSITORY_OWNER_ID."
      },
      {
        "name": "workflow",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Workflow is the workflow's name, or its path where it has none; that of the caller for reusable workflows, from GITHUB_WORKFLOW (OpenTelemetry: cicd.pipeline.name)."
      },
      {
        "name": "workflow_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "WorkflowRef is the path and ref of the workflow file, from GITHUB_WORKFLOW_REF."
      },
      {
        "name": "workflow_sha",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "WorkflowSHA is the commit of the workflow file, from GITHUB_WORKFLOW_SHA."
      },
      {
        "name": "job",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Job is the job's key in the workflow file, the same for all legs of a matrix, from GITHUB_JOB (OpenTelemetry: cicd.pipeline.task.name)."
      },
      {
        "name": "job_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobID is the numeric id of the job (its check run), from the runner's Worker log or JOB_CHECK_RUN_ID (OpenTelemetry: cicd.pipeline.task.run.id)."
      },
      {
        "name": "job_name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobName is the display name of the job with its matrix values, from the runner's Worker log."
      },
      {
        "name": "job_url",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobURL opens the log of the job; made from server_url, repository, run_id and job_id where all are known (OpenTelemetry: cicd.pipeline.task.run.url.full)."
      },
      {
        "name": "job_workflow_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "JobWorkflowRef is the path and ref of the reusable workflow that defines the job, where known."
      },
      {
        "name": "orchestration_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "OrchestrationID tells the legs of a matrix apart, from ACTIONS_ORCHESTRATION_ID (runner 2.331.0 and later, where the server sends it)."
      },
      {
        "name": "run_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "RunID is the id of the workflow run, from GITHUB_RUN_ID (OpenTelemetry: cicd.pipeline.run.id)."
      },
      {
        "name": "run_number",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "RunNumber is the number of the run in its workflow, from GITHUB_RUN_NUMBER."
      },
      {
        "name": "run_attempt",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "RunAttempt is 1 for the first attempt of the run, from GITHUB_RUN_ATTEMPT."
      },
      {
        "name": "event_name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "EventName is what triggered the workflow (push, schedule, ...), from GITHUB_EVENT_NAME."
      },
      {
        "name": "ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Ref is the full git ref of the run, from GITHUB_REF (OpenTelemetry: vcs.ref.head.name)."
      },
      {
        "name": "head_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "HeadRef is the source branch of a pull request, from GITHUB_HEAD_REF."
      },
      {
        "name": "sha",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "SHA is the commit of the run, from GITHUB_SHA (OpenTelemetry: vcs.ref.head.revision)."
      },
      {
        "name": "actor",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Actor is the login of who triggered the run first, from GITHUB_ACTOR."
      },
      {
        "name": "triggering_actor",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "TriggeringActor is the login of who triggered this attempt, from GITHUB_TRIGGERING_ACTOR."
      },
      {
        "name": "step",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Step is the id of the calling step, or the name the runner made for it (__run_2), from the caller's GITHUB_ACTION; never guessed by time, because steps can overlap."
      },
      {
        "name": "action_repository",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ActionRepository is owner/name of the action that the calling step uses, from GITHUB_ACTION_REPOSITORY or the path in GITHUB_ACTION_PATH."
      },
      {
        "name": "action_ref",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ActionRef is the ref of that action, from GITHUB_ACTION_REF."
      },
      {
        "name": "tracking_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "TrackingID is the runner's own id of the job (RUNNER_TRACKING_ID), by which records and sealed context find each other."
      },
      {
        "name": "runner",
        "type": "RECORD",
        "mode": "NULLABLE",
        "description": "Runner is the runner that ran the job.",
        "fields": [
          {
            "name": "name",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Name is the runner's name, from RUNNER_NAME; on Actions Runner Controller also the name of the pod."
          },
          {
            "name": "os",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "OS is Linux, Windows or macOS, from RUNNER_OS."
          },
          {
            "name": "arch",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Arch is X86, X64, ARM or ARM64, from RUNNER_ARCH."
          },
          {
            "name": "environment",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Environment is github-hosted or self-hosted, from RUNNER_ENVIRONMENT."
          },
          {
            "name": "labels",
            "type": "STRING",
            "mode": "REPEATED",
            "description": "Labels are the runner's labels or the name of its scale set, where the installation names them."
          }
        ]
      }
    ]
  },
  {
    "name": "host",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "Host is the machine, pod and node the record was made on.",
    "fields": [
      {
        "name": "name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Name is the host name; in a pod, the pod's name."
      },
      {
        "name": "pod",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Pod is the name of the Kubernetes pod, from POD_NAME (downward API)."
      },
      {
        "name": "namespace",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Namespace is the pod's namespace, from POD_NAMESPACE (downward API)."
      },
      {
        "name": "node",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Node is the name of the Kubernetes node, from NODE_NAME (downward API)."
      },
      {
        "name": "boot_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "BootID is the id of this boot of the kernel, from /proc/sys/kernel/random/boot_id."
      }
    ]
  },
  {
    "name": "invocation",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "Invocation describes a call of a wrapped tool (kind invocation).",
    "fields": [
      {
        "name": "tool",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Tool is the name the shim was called by: docker, podman, ..."
      },
      {
        "name": "command",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Command is the path of subcommands as typed: run, buildx build, image pull; empty where none was named."
      },
      {
        "name": "images",
        "type": "STRING",
        "mode": "REPEATED",
        "description": "Images are the image references named on the command line, in order, as typed."
      },
      {
        "name": "flags",
        "type": "STRING",
        "mode": "REPEATED",
        "description": "Flags are the names of the flags used, in order, without their values, as typed (-t, --build-arg)."
      },
      {
        "name": "platform",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Platform is the value of --platform."
      },
      {
        "name": "target",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Target is the build stage named by --target."
      },
      {
        "name": "argv",
        "type": "STRING",
        "mode": "REPEATED",
        "description": "Argv is the command line behind the tool's own name, redacted (docs/redaction.md); kept only where record_argv is set."
      },
      {
        "name": "argc",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Argc is the number of arguments, the tool's own name included."
      },
      {
        "name": "pid",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "PID is the process id, which docker keeps."
      },
      {
        "name": "ppid",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "PPID is the process id of the caller."
      },
      {
        "name": "uid",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "UID is the real user id of the caller; -1 where it is not known, in records from Worker logs."
      },
      {
        "name": "sudo",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "Sudo is true when the call came through sudo (SUDO_UID is set), which hides the job's variables."
      },
      {
        "name": "cwd",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Cwd is the working directory relative to GITHUB_WORKSPACE (\".\" is the workspace itself); empty where it lies outside or no workspace is known."
      },
      {
        "name": "stdin_tty",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "StdinTTY is true when standard input is a terminal."
      },
      {
        "name": "daemon",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Daemon is the class of daemon the call talks to, never its address: unix, tcp, ssh, npipe, fd, context or default."
      },
      {
        "name": "nested",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "Nested is true when a CLI plugin called docker again; such a call is not counted as one of the job's own."
      },
      {
        "name": "parent_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ParentID is the id of the invocation whose process is an ancestor of a nested call's. The agent writes it, where it sees the process and watches the parent."
      },
      {
        "name": "mono_ns",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "MonoNS is CLOCK_MONOTONIC in nanoseconds at the call, for durations that a clock step cannot falsify."
      },
      {
        "name": "truncated",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "Truncated is true when fields were cut to keep the record under 16 KiB."
      },
      {
        "name": "redaction",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Redaction is failed when the command line could not be examined safely; then only argc is kept."
      },
      {
        "name": "exec_error",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ExecError is the error of starting the real binary (ENOENT, EACCES, ELOOP, ...); empty where it started."
      },
      {
        "name": "path",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Path is the way the record took to the agent: socket or file. The agent writes it."
      }
    ]
  },
  {
    "name": "end",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "End describes the end of an invocation (kind invocation.end).",
    "fields": [
      {
        "name": "invocation_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "InvocationID is the id of the invocation record that ended."
      },
      {
        "name": "tool",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Tool and Command repeat the invocation's, so that an end can be counted alone."
      },
      {
        "name": "command",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Command repeats the invocation's command path."
      },
      {
        "name": "images",
        "type": "STRING",
        "mode": "REPEATED",
        "description": "Images repeat the invocation's images."
      },
      {
        "name": "duration_ns",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "DurationNS is the time from the call to the end, in nanoseconds."
      },
      {
        "name": "at_most",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "AtMost is true where the duration is an upper bound: the tool had ended before the agent looked for the first time, or source is socket_eof. Where it could be off by more than ten seconds, it is left out."
      },
      {
        "name": "exit_code",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "ExitCode is the exit code, 0 to 255; absent where unknown or where a signal ended the tool."
      },
      {
        "name": "signal",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Signal is the number of the signal that ended the tool."
      },
      {
        "name": "source",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Source says how the end was seen: pidfd_info (exit code and duration, Linux 6.15 and later), pidfd_poll (duration, Linux 5.3 and later), socket_eof (an upper bound of the duration), worker_log (what the runner wrote of its own processes) or unknown."
      }
    ]
  },
  {
    "name": "event",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "Event describes an event of the Docker daemon (kind event).",
    "fields": [
      {
        "name": "type",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Type is container, image, network, volume, builder, daemon, plugin, or other."
      },
      {
        "name": "action",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Action is the action cut at its first colon: the rest of an exec action is a command line, which can hold secrets."
      },
      {
        "name": "detail",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Detail is a harmless rest of the action: the state in health_status (healthy, unhealthy, starting)."
      },
      {
        "name": "scope",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Scope is local or swarm."
      },
      {
        "name": "actor_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ActorID is the id of the container, image, network or volume."
      },
      {
        "name": "image",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Image is the image reference as the daemon gives it: what the user typed for a container, the reference for an image event."
      },
      {
        "name": "name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Name is the name of the container, network or volume."
      },
      {
        "name": "time_nano",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "TimeNano is the daemon's own time of the event in nanoseconds since 1970, its identity in replays."
      },
      {
        "name": "received",
        "type": "TIMESTAMP",
        "mode": "NULLABLE",
        "description": "Received is the time the event was read from the stream. In tables with microseconds."
      },
      {
        "name": "exit_code",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "ExitCode is the exit code of a container (die) or of an exec (exec_die). A label of the same name can overwrite it in the daemon."
      },
      {
        "name": "duration_ns",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "DurationNS is the time from start to die of a container, in nanoseconds, by the daemon's clock."
      },
      {
        "name": "oom",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "OOM is true on die when the daemon reported an out-of-memory event for the container before."
      },
      {
        "name": "signal",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Signal is the signal of a kill event."
      },
      {
        "name": "exec_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "ExecID is the id of an exec."
      },
      {
        "name": "driver",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Driver is the driver of a volume or the type of a network."
      },
      {
        "name": "container",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Container is the id of the container that a network or volume event concerns."
      },
      {
        "name": "reclaimed_bytes",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "ReclaimedBytes is the space that a prune gave back."
      },
      {
        "name": "runner_made",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "RunnerMade is true for containers, networks and images that the runner itself made for a job (services, job containers, container actions)."
      },
      {
        "name": "labels",
        "type": "RECORD",
        "mode": "REPEATED",
        "description": "Labels are the labels of the container or image that the configuration lists.",
        "fields": [
          {
            "name": "key",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Key is the name of a label."
          },
          {
            "name": "value",
            "type": "STRING",
            "mode": "NULLABLE",
            "description": "Value is its value, cut at 4 KiB."
          }
        ]
      },
      {
        "name": "replayed",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "Replayed is true when the event was read again from the daemon's buffer after a reconnect."
      },
      {
        "name": "engine",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Engine is the id of the Docker daemon."
      },
      {
        "name": "waited_ns",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "WaitedNS is set in the first event after a start at which the Docker daemon was not up: how long it was waited for, in nanoseconds."
      }
    ]
  },
  {
    "name": "loss",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "Loss describes what could not be recorded or delivered (kind loss).",
    "fields": [
      {
        "name": "cause",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Cause is a short fixed word: stream_gap, daemon_restarted, queue_full, disk_full, disk_cap, torn_line, truncated_file, unreadable_file, cursor_lost, quarantine_full, shim, metrics_dropped, agent_restarted, rate_limited, changed_file."
      },
      {
        "name": "count",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Count is the number of records lost; -1 where it cannot be known."
      },
      {
        "name": "from",
        "type": "TIMESTAMP",
        "mode": "NULLABLE",
        "description": "From is the start of the time in which records were lost, where known. In tables with microseconds."
      },
      {
        "name": "to",
        "type": "TIMESTAMP",
        "mode": "NULLABLE",
        "description": "To is the end of that time. In tables with microseconds."
      },
      {
        "name": "source",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Source is the part that lost them: events, journal, spool, sink name, shim, or installation where one of its files was changed."
      },
      {
        "name": "detail",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Detail says more in plain words."
      }
    ]
  },
  {
    "name": "job",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "Job describes the start or the end of a job (kinds job.start and job.end).",
    "fields": [
      {
        "name": "outcome",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Outcome says how the context was closed: completed (by the job-completed hook), superseded (the next job began), abandoned (the runner's process went away) or shutdown (the agent was asked to stop)."
      },
      {
        "name": "started",
        "type": "TIMESTAMP",
        "mode": "NULLABLE",
        "description": "Started is the time the context was sealed. In tables with microseconds."
      },
      {
        "name": "duration_ns",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "DurationNS is the time from the start to the end of the context, in nanoseconds."
      },
      {
        "name": "version",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Version is the version of Tallyman on the runner."
      },
      {
        "name": "result",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Result is the result of the job as the runner wrote it, in lower case: succeeded, succeeded_with_issues, failed, canceled, skipped or abandoned. Known only where the record comes from the runner's Worker log."
      },
      {
        "name": "source",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Source is worker-log where the record was made from a Worker log afterwards; empty where it was made while the job ran."
      }
    ]
  },
  {
    "name": "http",
    "type": "RECORD",
    "mode": "NULLABLE",
    "description": "HTTP describes a request, or an hour of them, as the server that answered counted it (kind http).",
    "fields": [
      {
        "name": "source",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Source is what the record was imported from: github-csv (request logs from GitHub's support), dockerhub-csv (Docker Hub's usage export), csv or jsonl."
      },
      {
        "name": "row",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Row is the number of the row in the imported file, the first row of data being 1."
      },
      {
        "name": "count",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Count is how many requests the record stands for: 1 for a row that is one request. For Docker Hub's export it is version_checks and pulls together."
      },
      {
        "name": "period_ns",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "PeriodNS is the length of the time from ts on that the record stands for, in nanoseconds; absent for a single request."
      },
      {
        "name": "method",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Method is the request's method in capitals."
      },
      {
        "name": "host",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Host is the host that was asked, in lower case and without a port that is the scheme's own."
      },
      {
        "name": "path",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Path is the path of the URL, without query and fragment; segments that look like secrets read [REDACTED]."
      },
      {
        "name": "class",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Class says what kind of request the path is: git-refs, git-fetch, git-push, git-lfs, archive, raw, release, api, graphql, registry-manifest, registry-blob, registry-tags, registry-ping, token, web or other; pull and check for Docker Hub's counts, where only one of them is not 0."
      },
      {
        "name": "repository",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Repository is the repository that the path names, as owner/name without .git: what was asked for, not the repository of the job."
      },
      {
        "name": "status",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Status is the status code of the answer, 100 to 599."
      },
      {
        "name": "bytes",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Bytes is the length of the answer's body in bytes, as the server gives it."
      },
      {
        "name": "duration_ns",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "DurationNS is the time that the server took to answer, in nanoseconds."
      },
      {
        "name": "user_agent",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "UserAgent is the User-Agent header, without what looks like a secret."
      },
      {
        "name": "remote_addr",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "RemoteAddr is the IP address that the request came from, as the server saw it: for runners behind NAT, their shared egress address."
      },
      {
        "name": "remote_addrs",
        "type": "STRING",
        "mode": "REPEATED",
        "description": "RemoteAddrs are the addresses of a row that stands for requests from several; then remote_addr is empty."
      },
      {
        "name": "user",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "User is the account whose credentials the request carried; empty for anonymous requests and where the source does not say."
      },
      {
        "name": "anonymous",
        "type": "BOOLEAN",
        "mode": "NULLABLE",
        "description": "Anonymous is true where the source says that no credentials were given."
      },
      {
        "name": "token_name",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "TokenName is the name (never the value) of the access token that was used, as its owner called it."
      },
      {
        "name": "image",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Image is the repository of an image, with registry and namespace (docker.io/library/alpine)."
      },
      {
        "name": "tag",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Tag is the tag that was asked for."
      },
      {
        "name": "digest",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "Digest is the digest that was asked for or answered, as algorithm:hex."
      },
      {
        "name": "pulls",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Pulls is the number of pulls in the period, which count against Docker Hub's limits."
      },
      {
        "name": "version_checks",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "VersionChecks is the number of version checks in the period: manifests asked for by HEAD, which do not count against the limits."
      },
      {
        "name": "request_id",
        "type": "STRING",
        "mode": "NULLABLE",
        "description": "RequestID is the server's own id of the request (GitHub: X-GitHub-Request-Id)."
      },
      {
        "name": "candidates",
        "type": "INTEGER",
        "mode": "NULLABLE",
        "description": "Candidates is the number of jobs whose records could explain the row, where the import was joined to records of jobs; ci is set only where it is 1."
      }
    ]
  }
]
EOT
}

resource "google_bigquery_table" "owners" {
  project     = "acme-ci"
  dataset_id  = google_bigquery_dataset.tallyman.dataset_id
  table_id    = "owners"
  description = "Which team owns which repositories: your own rules, of which the last that fits counts."
  schema      = <<EOT
[
  {
    "name": "pattern",
    "type": "STRING",
    "mode": "NULLABLE",
    "description": "owner/name of a repository, or the beginning of such names and an asterisk."
  },
  {
    "name": "team",
    "type": "STRING",
    "mode": "NULLABLE",
    "description": "The team that owns them."
  },
  {
    "name": "line",
    "type": "INTEGER",
    "mode": "NULLABLE",
    "description": "The order of the rules."
  }
]
EOT
}

resource "google_bigquery_table" "calls" {
  project     = "acme-ci"
  dataset_id  = google_bigquery_dataset.tallyman.dataset_id
  table_id    = "calls"
  description = "What did each call do?"
  clustering  = ["repository"]
  time_partitioning {
    type          = "DAY"
    field         = "ts"
    expiration_ms = 34560000000
  }
  schema = <<EOT
[
  {
    "name": "ts",
    "type": "TIMESTAMP",
    "mode": "NULLABLE",
    "description": "the time"
  },
  {
    "name": "repository",
    "type": "STRING",
    "mode": "NULLABLE",
    "description": "owner/name"
  },
  {
    "name": "images",
    "type": "STRING",
    "mode": "REPEATED",
    "description": "images"
  },
  {
    "name": "n",
    "type": "INTEGER",
    "mode": "NULLABLE",
    "description": "number"
  },
  {
    "name": "share",
    "type": "FLOAT",
    "mode": "NULLABLE",
    "description": "share"
  },
  {
    "name": "ok",
    "type": "BOOLEAN",
    "mode": "NULLABLE",
    "description": "ok"
  }
]
EOT
}

resource "google_bigquery_table" "traffic" {
  project             = "acme-ci"
  dataset_id          = google_bigquery_dataset.tallyman.dataset_id
  table_id            = "traffic"
  description         = "Who \"calls\"? A note with $${x}."
  deletion_protection = false
  depends_on          = [google_bigquery_table.calls, google_bigquery_table.records]
  view {
    query          = <<EOT
SELECT r'^%%{2}$${' AS x
FROM `acme-ci.fleet.calls`
JOIN `acme-ci.fleet.records` ON TRUE
EOT
    use_legacy_sql = false
  }
}

resource "google_pubsub_topic" "tallyman" {
  project = "acme-ci"
  name    = "records"
}

resource "google_pubsub_topic" "dead" {
  project = "acme-ci"
  name    = "dead"
}

resource "google_pubsub_subscription" "dead" {
  project                    = "acme-ci"
  name                       = "dead"
  topic                      = google_pubsub_topic.dead.id
  message_retention_duration = "604800s"
  expiration_policy {
    ttl = ""
  }
}

resource "google_pubsub_subscription" "tallyman" {
  project                    = "acme-ci"
  name                       = "to-bq"
  topic                      = google_pubsub_topic.tallyman.id
  message_retention_duration = "604800s"
  depends_on                 = [google_bigquery_table_iam_member.agent_dataeditor, google_bigquery_table_iam_member.agent_metadataviewer]
  expiration_policy {
    ttl = ""
  }
  bigquery_config {
    table               = "${google_bigquery_table.records.project}.${google_bigquery_table.records.dataset_id}.${google_bigquery_table.records.table_id}"
    use_table_schema    = true
    drop_unknown_fields = true
  }
  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.dead.id
    max_delivery_attempts = 20
  }
  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }
}

resource "google_bigquery_table_iam_member" "agent_dataeditor" {
  project    = "acme-ci"
  dataset_id = google_bigquery_dataset.tallyman.dataset_id
  table_id   = google_bigquery_table.records.table_id
  role       = "roles/bigquery.dataEditor"
  member     = "serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_bigquery_table_iam_member" "agent_metadataviewer" {
  project    = "acme-ci"
  dataset_id = google_bigquery_dataset.tallyman.dataset_id
  table_id   = google_bigquery_table.records.table_id
  role       = "roles/bigquery.metadataViewer"
  member     = "serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_topic_iam_member" "agent_publisher" {
  project = "acme-ci"
  topic   = google_pubsub_topic.dead.name
  role    = "roles/pubsub.publisher"
  member  = "serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_subscription_iam_member" "agent_subscriber" {
  project      = "acme-ci"
  subscription = google_pubsub_subscription.tallyman.name
  role         = "roles/pubsub.subscriber"
  member       = "serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_topic_iam_member" "runners_publisher" {
  project = "acme-ci"
  topic   = google_pubsub_topic.tallyman.name
  role    = "roles/pubsub.publisher"
  member  = "serviceAccount:runners@acme-ci.iam.gserviceaccount.com"
}
